"""Word lists for finding names: plain facts of two languages, written as text."""

from __future__ import annotations

__all__ = [
    "CN_WEAK",
    "DOUBLE_SURNAMES",
    "GIVEN_EN",
    "NOT_GIVEN",
    "NOT_NAMES",
    "NOT_NAMES_CN",
    "SURNAMES",
]

# Common Chinese surnames of one character.
SURNAMES = (
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林罗郑梁谢宋唐许韩冯邓曹彭曾肖田董袁潘于蒋蔡余杜叶程苏魏吕丁任沈姚卢姜崔钟谭陆汪范金"
    "石廖贾夏韦付方白邹孟熊秦邱江尹薛闫段雷侯龙史陶黎贺顾毛郝龚邵万钱严覃武戴莫孔向汤康易乔赖文施洪辛柯庄温鲁葛樊聂梅盛霍翁邢"
    "殷俞倪章骆申耿关焦柳欧祝纪尚毕舒游阳裴卓窦詹苗岳齐包冉宫费卞季阮蓝褚应宁柴詹卫蒲谷车凌邬甘童鲍凤路池宗祁简涂饶沙敖管娄危"
    "桂牛萧闵丘庞覃佟仇蔺晏班芦曲邸凃岑褟揭雒"
    # The same in traditional characters, where they differ.
    "張劉陳楊黃趙吳孫馬羅鄭謝許韓馮鄧蕭葉蘇魏呂盧鍾譚陸範賈鄒閻龍賀顧龔萬錢嚴湯賴溫魯聶顏倪莊樊歐陽簡塗連鄔饒龐駱紀齊寧關詹"
)
# And of two, as a pattern.
DOUBLE_SURNAMES = (
    "欧阳|歐陽|司馬|諸葛|司马|上官|诸葛|东方|皇甫|尉迟|公孙|慕容|令狐|司徒|端木|夏侯|"
    "南宫|轩辕|长孙|宇文|独孤|西门|百里"
)
# Characters that hardly stand in a given name and often come right behind one.
NOT_GIVEN = (
    "的了是在有和与及或也都就还又说要想会能可到去来从向对把被让给跟吗呢吧啊呀很不没别您你我他她它们这那哪谁什么怎样个今现住已"
    "将因由所以但而且其之于为叫做请问您好等着过得地上下里外前后左右男女岁年月日号电手身证卡联系地址邮箱微信出性职负毕就患入向"
    "至曾刚当且并如若总先医教经主任律同师护局院警博硕部科处员工司队长签署称告诉打买卖用写发收寄付"
)
# Common words that begin with a character that is also a surname, as a pattern.
NOT_NAMES_CN = (
    "高[中级校等考度速铁兴]|马[上路]|安[全装排]|方[面法案便向式]|金[融额牌属]|黄[金色河山]|"
    "白[色天]|石[油头]|任[务何意]|常[见用常规]|许[多可]|"
    "文[件字本章化学档]|牛[奶肉]|万[一元]|成[功为本员长]|程[序度]|余额|路[由线上]|温[度馨暖]|"
    "平台|周[末一二三四五六日围期年]|顾[客问]|钱包|车[辆牌站]|"
    "毛[病利]|夏[天季]|康复|元素|包[括含装]|单[位元独]|管[理道]|项目|房[屋间东子]|解[决释]|"
    "应[该用当届]|连[接续]|全[部国名]|国[家际]|段落|章节|曲线|"
    "关[于系闭心注键]|季[节度]|江[苏西南湖]|云[南计]|广[东西]|贵[州宾]|沙[发漠]|向[导上下]|龙头|"
    "雷达|孙[子女]|陆[地续]|施工|梅花|贺[卡信]|"
    "祝[福你您]|车主|史[上料]|陈[述列旧]|严[重格]|谢谢|谢意|何[时处必况为]|付[款费出]|计[算划]|"
    "凌晨|宫殿|童[年话]|游[戏客泳]|阳[光台]|和平|花[园费]|"
    "水[果平]|范[围例]|习[惯题]|易[于用]|时[间候]|冷静|林[业区]|罗[列马]|唐[朝诗]|宋[朝代词]|"
    "汉[语字]|明[天白显]|华[为语]|洪水|湖[北南]|"
    "馬上|馬路|黃[金色]|許多|萬一|謝謝|葉子|陳述|連接|關[於係心]|顧客|嚴重|龍頭|溫度|簡[單介]|齊全|範[圍例]|"
    "董事|连[忙衣]|曲[子线调]|班[级长车主组]|应聘|海[洋南]|边[界缘]|费[用率]|舒[服适]|莫名|项[链]|顾虑|鲁莽|尚[未且]|丰富"
)
# Words that a name may follow, and a lot else.
CN_WEAK = (
    "丈夫 主任 表哥 表弟 表姐 表妹 堂哥 堂弟 堂姐 堂妹 叔叔 舅舅 姑姑 爷爷 奶奶 外公 外婆 邻居 室友 "
    "男友 女友 男朋友 女朋友 老板 秘书 助理 领导 找 @ 病患 護士 護理師 醫師 醫生 老師 護士 客戶 學生 "
    "父親 母親 同學 我係 "
    "乘客 儿子 医生 叫 司机 同事 名字 员工 哥哥 女儿 妈妈 妹妹 妻子 姐姐 学生 客人 "
    "客户 家长 尊敬的 弟弟 律师 患者 我是 房东 教授 旅客 朋友 本人 母亲 法人 父亲 "
    "爸爸 病人 签名 经理 署名 老公 老婆 老师 致 证人"
)
# Given names common in English-speaking countries.
GIVEN_EN = (
    "Aaron Abigail Adam Adrian Agnes Ahmed Aisha Alan Albert Alejandro Alex Alexander Alexandra Alexis "
    "Alfred Ali Alice Alicia Alison Allison Amanda Amber Amelia Amy Ana Andrea Andrew Angela Anita Ann "
    "Anna Anne Annie Anthony Antonio April Arthur Ashley Audrey Barbara Beatrice Benjamin Bernard Beth "
    "Betty Beverly Bobby Bonnie Bradley Brandon Brenda Brian Brittany Bruce Bryan Caleb Calvin Cameron "
    "Carl Carla Carlos Carol Caroline Carolyn Catherine Cecilia Charles Charlotte Chen Cheryl Chloe "
    "Christian Christina Christine Christopher Cindy Claire Clara Clarence Claudia Colin Connor Craig "
    "Crystal Cynthia Daniel Danielle David Deborah Debra Denise Dennis Derek Diana Diane Diego Dmitri "
    "Donald Donna Dorothy Douglas Dylan Edith Edward Edwin Eileen Elaine Eleanor Elena Elizabeth Ella "
    "Ellen Emily Emma Eric Erica Erik Ethan Eugene Eva Evelyn Fatima Felix Fernando Fiona Frances "
    "Francesca Francis Francisco Frank Fred Frederick Gabriel Gabriela Gary George Gerald Giovanni Gladys "
    "Gloria Gordon Graham Gregory Hannah Harold Harriet Harry Hassan Heather Hector Helen Henry Howard "
    "Hugo Ian Ibrahim Irene Isaac Isabel Isabella Ivan Jack Jacob Jacqueline James Jamie Jane Janet "
    "Janice Jason Javier Jean Jeffrey Jennifer Jeremy Jerry Jesse Jessica Jesus Joan Joanna Joe Joel "
    "Johannes John Johnny Jonathan Jorge Jose Joseph Joshua Joyce Juan Juanita Judith Judy Julia Julian "
    "Julie Justin Karen Karl Katherine Kathleen Kathryn Katie Keith Kelly Kenneth Kevin Kimberly Klaus "
    "Kristen Kyle Larry Laura Lauren Lawrence Leah Leo Leonard Leslie Lillian Linda Lisa Logan Lois Lori "
    "Louis Louise Lucas Lucia Lucy Luis Luke Madison Manuel Marcus Margaret Maria Marie Marilyn Mario "
    "Marjorie Martha Martin Mary Matthew Maureen Max Megan Melanie Melissa Mia Michael Michelle Miguel "
    "Mohamed Mohammed Molly Monica Muhammad Nancy Naomi Natalie Nathan Nicholas Nicole Noah Nora Norman "
    "Oliver Olivia Omar Oscar Pamela Patricia Patrick Paul Paula Pedro Peter Philip Phillip Phyllis Priya "
    "Rachel Rafael Raj Ralph Ramon Randy Raymond Rebecca Regina Ricardo Richard Rita Robert Roberto Robin "
    "Rodney Roger Ronald Rosa Rose Rosemary Roy Russell Ruth Ryan Sally Samantha Samuel Sandra Sara Sarah "
    "Scott Sean Sebastian Sergio Sharon Sheila Shirley Simon Sofia Sophia Sophie Stephanie Stephen Steve "
    "Steven Stuart Susan Suzanne Sylvia Tamara Teresa Terry Theodore Theresa Thomas Tiffany Timothy Tina "
    "Todd Tony Tracy Tyler Valerie Vanessa Veronica Victor Victoria Vincent Virginia Walter Wanda Wayne "
    "Wendy William Willie Yusuf Yvonne Zachary Zoe "
    "Aaliyah Abdul Adele Aditya Agnieszka Aidan Akira Alana Alina Alvin Amara Amelie Amina Amir Amit "
    "Anders Andrei "
    "Andreas Angelo Anika Anil Anjali Annika Antoine Anton Arjun Arnold Arturo Astrid Ayesha Barry "
    "Beatrix Bella "
    "Benedict Benoit Bernadette Bianca Birgit Bjorn Bogdan Boris Brandi Brendan Bridget Bronwyn Camila "
    "Camille Carmen "
    "Cedric Celeste Chad Chantal Chinedu Chiara Clement Clifford Clinton Cody Cole Corey Cristian "
    "Curtis Damian Dana "
    "Darnell Darren Darryl Deepak Delia Dennis Desmond Diego Dimitri Dominic Doreen Doris Duncan "
    "Dwayne Edgar Eduardo "
    "Eleni Elias Elijah Eliza Elsa Emanuel Emilio Enrique Erika Ernest Esther Etienne Evan Fabian "
    "Farah Felicity "
    "Felipe Florian Francois Freya Gareth Gavin Genevieve Georgina Gerhard Gianni Gilbert Gina Giulia "
    "Greta Guillermo "
    "Gunther Gustavo Hamza Hanna Hans Haruto Heidi Heinz Henrik Herbert Hilary Hiroshi Hugh Ibrahim "
    "Igor Imani Ingrid "
    "Irina Isla Ismail Jamal Jan Jana Jasmine Jasper Jed Jens Jill Joachim Joaquin Jodi Jonas "
    "Josephine Josie "
    "Julio Jurgen Jürgen Kamala Karim Karin Katarzyna Kayla Kelsey Kenji Khalid Kieran Kirsten "
    "Konstantin Krzysztof "
    "Kurt Lakshmi Lars Latoya Layla Leila Lena Leon Leroy Liam Liliana Lionel Lloyd Lorenzo Lorraine "
    "Luca Luisa "
    "Magdalena Malcolm Malik Manoj Marcel Marco Marek Margot Marian Mariana Marina Marlene Marta "
    "Marvin Mateo Mathias "
    "Matteo Maximilian Mehmet Mei Mercedes Mika Mikhail Milan Miles Miranda Mohammad Moritz Mustafa "
    "Nadia Natalia "
    "Natasha Neil Nelson Nigel Niklas Nikolai Nina Nisha Nkechi Norbert Olga Oleg Osman Otto Pablo "
    "Paolo Pascal Petra "
    "Phoebe Pierre Pierrette Pooja Rahul Rajesh Ramesh Raquel Raul Ravi Regina Renee Rhonda Rohan "
    "Roland Roman Rosalind "
    "Roxanne Ruben Rudolf Rupert Sabrina Sadie Salma Salvatore Sanjay Santiago Saskia Selena Sergei "
    "Shannon Shane Shaun "
    "Shawn Sigrid Silvia Simone Sonia Stacey Stacy Stanley Stefan Stefania Sunita Sven Svetlana "
    "Tabitha Takashi Tamika "
    "Tanya Tara Tatiana Tomas Tomasz Travis Trevor Trisha Tunde Ursula Valentina Vera Vijay Vikram "
    "Viktor Vivian "
    "Vladimir Wesley Wilfred Wojciech Xavier Yasmin Yuki Yuri Yusuf Yvette Zainab Zara Zhanna"
)
# Capitalised words that are no part of a name.
NOT_NAMES = (
    "Address All An Desk Help Technical Sales Spring Center Centre Office Department Windows Group "
    "Human Online "
    "Account Accounts Billing Chrome Firefox  And Anonymous April Are At August Avenue Bank Be But Can "
    "Colleague Colleagues College "
    "Committee Company Corporation Could Customer Customers Date December Did Do Does Dr Editor Else "
    "Email Everyone Example False February First Folks For Friday Friend Friends From Full Glad God Going "
    "Guest Guests Guys Had Happy Has Have Her Here Hiring His Hospital How Human Id If In Inc Is It Its "
    "January July June Last Looking Lord Ltd Madam Manager March May Member Members Miss Monday Mr Mrs Ms "
    "Mx My Name Names None Not November Null Number October Of On Our Parent Parents Phone Please Prof "
    "Reader Readers Recruiter Resources Road Santa Saturday September Service Should Sir Sorry Street "
    "Student Students Sunday Support Sure Team Test Thank Thanks That The Their Then There These This "
    "Those Thursday To True Trying Tuesday University Unknown User Users Value Valued Was Wednesday Were "
    "What When Where Which Who Whom Whose Why Will With Working World Would Writing Yes Your"
)
